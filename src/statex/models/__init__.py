"""Model classes: the Hugging Face-native GLA, and the expanded forms of every family."""
