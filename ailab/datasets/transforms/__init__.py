"""What changes a sample or a batch: torchvision's transforms by name, and those that ailab adds."""
