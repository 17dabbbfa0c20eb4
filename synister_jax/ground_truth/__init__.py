# SPDX-License-Identifier: Apache-2.0
"""Published labels of synapses, and their split into train, validation and test."""
