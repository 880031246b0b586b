"""Files and folders of media into arrays: frames, sound, flow and plain tensors, and the processes that decode them."""
