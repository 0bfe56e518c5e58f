"""What a checkpoint is: its architecture, its weights' versions, its tower and its images."""
