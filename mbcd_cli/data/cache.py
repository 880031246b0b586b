"""HDF5 cache: schema, fingerprint, crash-safe writer, fast reader. (Being written; the reader's contract is below.)

    dataset = open_dataset(settings)            # joins the modalities' caches that match `settings`
    dataset.name, dataset.domains, dataset.label_names, dataset.classes
    dataset.modalities      dict[str, Modality], resolved settings in fusion order
    dataset.fingerprints    dict[str, str]
    dataset.tail_weights    dict[str, state dict]   (pretrained tails stored by prepare; may be empty)
    dataset.clips           ClipTable: ids [N] list[str], domains [N] int, splits [N] int (0 train, 1 test), labels [N] int
    dataset.rejected        list[Rejected(clip, modality, file, cause, remedy)]
    dataset.select(domains=("studio",), splits=("train",), limit=None) -> int64 ndarray of clip indices, table order
    dataset.batches(clips, batch_size=16, training=True, seed=0, epoch=0, drop_last=True, start=0) -> Iterator[Batch]
        training: shuffled by (seed, epoch), one random stored training view per clip; `start` skips that many batches
        training=False: table order, the one test view; the last batch may be short
"""
