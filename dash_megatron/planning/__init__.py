"""The arithmetic of scale: memory, bytes and step time of a layout, and the search for a good one."""
