"""The tiny text-to-video and image-to-video pipelines: clips of moving shapes, training, measuring. See README.md."""
