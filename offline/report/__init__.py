"""What quantization did to a model: errors measured while it is quantized, and the page that shows them."""
