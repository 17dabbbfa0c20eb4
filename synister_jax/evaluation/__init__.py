# SPDX-License-Identifier: Apache-2.0
"""How right predictions are, and which transmitter a group of synapses has."""
