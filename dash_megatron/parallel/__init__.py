"""Process groups: how this process was launched, and the groups Megatron-core makes of all of them."""

from dash_megatron.parallel.groups import destroy_process_groups, init_process_groups
from dash_megatron.parallel.launch import Launch, read_launch

__all__ = ["Launch", "destroy_process_groups", "init_process_groups", "read_launch"]
