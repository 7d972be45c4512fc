"""The commands: inspect, merge, reshard, convert, verify, diff. Nothing here imports torch at module level."""
