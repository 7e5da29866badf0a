"""Where every weight lies in Hugging Face tensors; reading them, adapting them, freezing them."""
