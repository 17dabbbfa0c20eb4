# SPDX-License-Identifier: Apache-2.0
"""The networks, their weights and checkpoints, and inference with them."""
