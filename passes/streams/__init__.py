"""From a layer function to a schedule on streams: durations, task graph, software pipelining, events, buffers."""
