# SPDX-License-Identifier: Apache-2.0
"""Prediction files of other tools: written, read and compared."""
