"""The parts that the examples share: data, a classifier over a pretrained encoder, the training
loop, the report."""
