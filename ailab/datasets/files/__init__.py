"""One file at a time: pictures, sound, video, run-length masks, boxes, vocabularies; and the cache of what was decoded."""
