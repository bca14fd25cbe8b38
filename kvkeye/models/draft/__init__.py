"""EAGLE-3 style draft heads: one decoder layer that continues a target's features and shares its embeddings."""
