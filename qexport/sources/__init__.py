"""Front ends: whatever the user names becomes an ONNX graph with input specs, example inputs and module names."""
