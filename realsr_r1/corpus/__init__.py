"""Own photographs: reading, captioning and packing them."""
