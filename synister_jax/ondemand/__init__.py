# SPDX-License-Identifier: Apache-2.0
"""Requests answered: what is asked, where its synapses come from, the answer."""
