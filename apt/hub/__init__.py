"""The Hugging Face Hub: download files, pull whole models, and push models with a card."""
