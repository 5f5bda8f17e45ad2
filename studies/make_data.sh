#!/usr/bin/env bash
# The data of the studies of language, retrieval and scaling, in data/: tokens of two folders of texts, whose subfolders become documents, a
# tokenizer, and documents that only long memory predicts. data/valid is of VALID_FOLDER, another source; data/held_out is a share of the
# documents of the sources trained on, none of which is trained on.
#   studies/make_data.sh TRAIN_FOLDER... -- VALID_FOLDER
# Variables: PYTHON, VOCAB_SIZE, HELD_OUT (the share), LONG_TOKENS, MIDDLE_TOKENS and SHORT_TOKENS (of retrieval, about), LENGTHS,
# MIDDLE_LENGTHS and SHORT_LENGTHS (of its documents: those of a row, so that no row parts a question from its answer), PARTS (processes that make
# it), OUTPUT.
set -euo pipefail
PYTHON=${PYTHON:-python3}
OUTPUT=${OUTPUT:-data}
PARTS=${PARTS:-$(($(nproc) / 2 + 1))}
HELD_OUT=${HELD_OUT:-0.03}

folders=()
while [[ $# -gt 0 && $1 != -- ]]; do
    folders+=("$1")
    shift
done
if [[ ${#folders[@]} -eq 0 || $# -ne 2 ]]; then
    echo "usage: studies/make_data.sh TRAIN_FOLDER... -- VALID_FOLDER" >&2
    exit 2
fi

corpus() {  # NAME FOLDER...: bad lines are files that are no UTF-8
    "$PYTHON" -m data_tools.make_corpus --join-folders --shard-mb 4 --max-bad-lines 100000 --output "$OUTPUT/corpus/$1" --input "${@:2}"
}
tokens() {  # NAME INPUT [SHARE NAME]: it becomes OUTPUT/NAME.bin and .idx, but for a share of its documents, which gets another name
    "$PYTHON" -m data_tools.tokenize_corpus --input "$2" --tokenizer "$OUTPUT/tokenizer.model" --output "$OUTPUT/tokens/$1" --valid-fraction "${3:-0}"
    local suffix
    for suffix in bin idx idx.json; do
        ln -sf "tokens/$1/train.$suffix" "$OUTPUT/$1.$suffix"
        [[ $# -lt 4 ]] || ln -sf "tokens/$1/valid.$suffix" "$OUTPUT/$4.$suffix"
    done
}
retrieval() {  # NAME CORPUS LENGTHS TOKENS FIRST_SEED
    local part made=() share=0
    [[ $2 != train ]] || share=$HELD_OUT  # the held-out documents are in no filler either
    mkdir -p "$OUTPUT/corpus/$1"
    for ((part = 0; part < PARTS; part++)); do
        "$PYTHON" -m data_tools.make_retrieval --text "$OUTPUT/corpus/$2" --tokenizer "$OUTPUT/tokenizer.model" --lengths $3 \
            --valid-fraction "$share" --tokens "$("$PYTHON" -c "print($4 / $PARTS)")" --seed $(($5 + part)) --output "$OUTPUT/corpus/$1/$part.jsonl" &
        made+=($!)
    done
    for part in "${made[@]}"; do
        wait "$part"
    done
    tokens "$1" "$OUTPUT/corpus/$1"
}

corpus train "${folders[@]}"
corpus valid "$2"
"$PYTHON" -m data_tools.train_tokenizer --input "$OUTPUT/corpus/train" --vocab-size "${VOCAB_SIZE:-16384}" --max-mb 60 --output "$OUTPUT/tokenizer.model"
tokens train "$OUTPUT/corpus/train" "$HELD_OUT" held_out
tokens valid "$OUTPUT/corpus/valid"
retrieval retrieval train "${LENGTHS:-16384 16384}" "${LONG_TOKENS:-5.4e7}" 0
retrieval retrieval_8k train "${MIDDLE_LENGTHS:-8192 8192}" "${MIDDLE_TOKENS:-1.6e7}" 3000
retrieval retrieval_short train "${SHORT_LENGTHS:-2048 2048}" "${SHORT_TOKENS:-3.2e7}" 1000
PARTS=1 retrieval retrieval_valid valid "${LENGTHS:-16384 16384}" "$("$PYTHON" -c "print(${LONG_TOKENS:-5.4e7} / 36)")" 2000
