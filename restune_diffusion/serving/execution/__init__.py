"""How the engine executes requests: admission, preparation, shared U-Net calls, decoding."""
