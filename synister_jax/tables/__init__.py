# SPDX-License-Identifier: Apache-2.0
"""The two tables, synapses and predictions, in files and in MongoDB."""
