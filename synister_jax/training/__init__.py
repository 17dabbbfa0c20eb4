# SPDX-License-Identifier: Apache-2.0
"""From shards of crops to a trained run."""
