"""Which weights the student keeps."""
