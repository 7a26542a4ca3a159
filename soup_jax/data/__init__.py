"""From documents to batches: corpus, domains, domain weights, the sampling plan, the loader."""
