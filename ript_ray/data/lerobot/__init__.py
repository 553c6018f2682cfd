"""LeRobot datasets, read and written by pyarrow alone.

A dataset is a folder. In v3.0 a data file or film holds many episodes, in v2.1 one::

    v3.0                                        v2.1
    meta/info.json                              meta/info.json                         version, features, patterns
    meta/tasks.parquet                          meta/tasks.jsonl                       instruction by task_index
    meta/episodes/chunk-000/file-000.parquet    meta/episodes.jsonl                    length, and where the rows are
    meta/stats.json                             meta/episodes_stats.jsonl
    data/chunk-000/file-000.parquet             data/chunk-000/episode_000000.parquet
    videos/KEY/chunk-000/file-000.mp4           videos/chunk-000/KEY/episode_000000.mp4
"""
