"""File formats: images, audio, video, run-length encoded masks, bounding boxes, vocabularies, and the cache of decoded images."""
