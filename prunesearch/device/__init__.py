"""What the parts of a model take on a device, measured once, so that latency is arithmetic afterwards."""
