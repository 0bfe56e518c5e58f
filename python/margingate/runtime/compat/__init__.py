"""What is written for one SGLang release and one machine."""
