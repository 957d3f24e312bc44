"""Model classes: the Hugging Face-native GLA, and the expanded forms of every family."""

# Its table of configurations comes first, and with it the registration of ours (see the package's __init__): while one
# of our configurations is half imported, it could not be registered.
import transformers.models.auto.configuration_auto  # noqa: F401
