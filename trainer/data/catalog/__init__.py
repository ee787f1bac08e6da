"""What `prepare` knows of every image: found, judged, compared with the sources, grouped into shards."""
