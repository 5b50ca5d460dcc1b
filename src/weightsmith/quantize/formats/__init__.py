"""Write and read quantized models: packed integers, folders, ONNX."""
