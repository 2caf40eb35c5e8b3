/*
   Copyright The guest-pull Authors.

   Licensed under the Apache License, Version 2.0 (the "License");
   you may not use this file except in compliance with the License.
   You may obtain a copy of the License at

       http://www.apache.org/licenses/LICENSE-2.0

   Unless required by applicable law or agreed to in writing, software
   distributed under the License is distributed on an "AS IS" BASIS,
   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
   See the License for the specific language governing permissions and
   limitations under the License.
*/

package main

import (
	"bytes"
	"fmt"

	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/plugin"
	"github.com/pelletier/go-toml/v2"
)

// addUnpackConfig adds the guest-pull snapshotter to the transfer service's
// default unpack_config. Without it, CRI's default way to pull refuses the
// snapshotter ("no unpack platforms defined"). It is set where the user's
// configuration is decoded into, which replaces the list.
//
// containerd applies its own default entries (plugins/transfer/plugin_defaults_linux.go)
// only to a list that is not there, so they are repeated here.
func addUnpackConfig(graph []plugin.Registration) error {
	b, err := toml.Marshal(map[string][]unpackConfig{"unpack_config": unpackConfigs()})
	if err != nil {
		return fmt.Errorf("default unpack_config: %w", err)
	}
	for _, r := range graph {
		if r.Type == plugins.TransferPlugin && r.ID == "local" {
			if err := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(r.Config); err != nil {
				return fmt.Errorf("default unpack_config of the transfer service: %w", err)
			}
			return nil
		}
	}
	return fmt.Errorf("default unpack_config: this containerd has no plugin %s.local", plugins.TransferPlugin)
}
