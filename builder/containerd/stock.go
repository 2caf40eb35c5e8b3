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
	"context"
	"iter"
	"slices"

	srvconfig "github.com/containerd/containerd/v2/cmd/containerd/server/config"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/platforms"
	"github.com/containerd/plugin"

	guestpull "github.com/guest-pull/guest-pull-snapshotter/plugin"
)

// unpackConfig is an entry of the transfer service's unpack_config
// (containerd, plugins/transfer/plugin.go, unpackConfiguration).
type unpackConfig struct {
	Platform    string `toml:"platform"`
	Snapshotter string `toml:"snapshotter"`
	Differ      string `toml:"differ"`
	Optional    bool   `toml:"optional"`
}

// unpackConfigs are containerd's own entries, and ours.
func unpackConfigs() []unpackConfig {
	platform := platforms.DefaultSpec()
	erofs := platforms.DefaultSpec()
	erofs.OSFeatures = []string{"erofs"}
	return []unpackConfig{
		{Platform: platforms.Format(platform), Snapshotter: defaults.DefaultSnapshotter, Differ: defaults.DefaultDiffer},
		{Platform: platforms.FormatAll(erofs), Snapshotter: "erofs", Differ: "erofs", Optional: true},
		{Platform: platforms.Format(platform), Snapshotter: guestpull.ID, Differ: defaults.DefaultDiffer, Optional: true},
	}
}

// loadConfig loads a configuration with its imports into config, in the newest
// version of its format.
func loadConfig(ctx context.Context, path string, graph []plugin.Registration, config *srvconfig.Config) error {
	registered := func() iter.Seq[plugin.Registration] { return slices.Values(graph) }
	return srvconfig.LoadConfigWithPlugins(ctx, path, registered, config)
}
