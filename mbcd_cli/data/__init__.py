"""What a clip is and how it reaches a batch: readers, media, kinds of modality, the cache."""
