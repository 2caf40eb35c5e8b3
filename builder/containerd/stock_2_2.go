//go:build containerd_2_2

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

	srvconfig "github.com/containerd/containerd/v2/cmd/containerd/server/config"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/version"
	"github.com/containerd/platforms"
	"github.com/containerd/plugin"

	guestpull "github.com/guest-pull/guest-pull-snapshotter/plugin"
)

// needsRuntimePlatforms: CRI does not tell its image service the handlers'
// snapshotters.
const needsRuntimePlatforms = true

// unpackConfig is an entry of the transfer service's unpack_config
// (containerd, plugins/transfer/plugin.go, unpackConfiguration).
type unpackConfig struct {
	Platform    string `toml:"platform"`
	Snapshotter string `toml:"snapshotter"`
	Differ      string `toml:"differ"`
}

// unpackConfigs are containerd's own entry, and ours.
func unpackConfigs() []unpackConfig {
	platform := platforms.Format(platforms.DefaultSpec())
	return []unpackConfig{
		{Platform: platform, Snapshotter: defaults.DefaultSnapshotter, Differ: defaults.DefaultDiffer},
		{Platform: platform, Snapshotter: guestpull.ID, Differ: defaults.DefaultDiffer},
	}
}

// loadConfig loads a configuration with its imports into config, in the newest
// version of its format. The address, which has a section of its own from 2.3 on,
// is given one.
func loadConfig(ctx context.Context, path string, graph []plugin.Registration, config *srvconfig.Config) error {
	if err := srvconfig.LoadConfig(ctx, path, config); err != nil {
		return err
	}
	for v := config.Version; v < version.ConfigVersion; v++ {
		for _, p := range graph {
			if p.ConfigMigration != nil {
				if err := p.ConfigMigration(ctx, v, config.Plugins); err != nil {
					return err
				}
			}
		}
	}
	if err := config.MigrateConfig(ctx); err != nil {
		return err
	}
	if config.GRPC.Address != "" {
		config.Plugins[grpcSection] = map[string]any{"address": config.GRPC.Address}
	}
	return nil
}
