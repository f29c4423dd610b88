"""Workers that run evaluations: in this process, in a child process, or on Ray."""
