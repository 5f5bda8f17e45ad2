"""Repairs to the interpreter of Triton 3.6, which runs kernels on CPU tensors; nothing on the GPU passes through here."""

import os


def repair_interpreter() -> None:
    """Let scalars bound a loop beside NumPy 2.4, and matrix products take bfloat16, whenever Triton was imported.

    Only under TRITON_INTERPRET=1.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import numpy as np
    import triton
    import triton.language as tl
    from triton.language import standard
    from triton.runtime import interpreter

    patch_tensor, create_dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        # NumPy no longer turns an array of one element into an int
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widen(x):
        # the interpreter keeps bfloat16 as its bits, and would multiply those
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: create_dot(
        self, widen(a), widen(b), *rest
    )
    # where Triton was imported before the variable was set, its own functions are still to be compiled
    for module in (standard, tl, triton):
        for name, function in list(vars(module).items()):
            if isinstance(function, triton.JITFunction):
                setattr(module, name, interpreter.InterpretedFunction(function.fn))
