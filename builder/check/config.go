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

package check

import (
	"fmt"
	"path/filepath"

	"github.com/pelletier/go-toml/v2"
)

// The plugins of containerd that the checks look at.
const (
	runtimeURI  = "io.containerd.cri.v1.runtime"
	imagesURI   = "io.containerd.cri.v1.images"
	transferURI = "io.containerd.transfer.v1.local"
	grpcURI     = "io.containerd.server.v1.grpc"
	criURI      = "io.containerd.grpc.v1.cri"
)

// Config is the part that matters of containerd's effective configuration: all
// files merged, migrated to the current version, with the plugins' defaults.
type Config struct {
	// Path is the main configuration file, which need not exist.
	Path string `toml:"-"`
	// UnknownKeys are keys of plugins' sections that containerd ignores, as
	// "section: key".
	UnknownKeys []string `toml:"-"`

	Root            string                 `toml:"root"`
	DisabledPlugins []string               `toml:"disabled_plugins"`
	ProxyPlugins    map[string]ProxyPlugin `toml:"proxy_plugins"`
	Plugins         Plugins                `toml:"plugins"`
}

// ProxyPlugin is a plugin that is a process of its own.
type ProxyPlugin struct {
	Type    string `toml:"type"`
	Address string `toml:"address"`
}

// Plugins are the sections of plugins.
type Plugins struct {
	Snapshotter struct {
		RootPath     string `toml:"root_path"`
		MountType    string `toml:"mount_type"`
		ResolveUsers string `toml:"resolve_users"`
	} `toml:"io.containerd.snapshotter.v1.guest-pull"`
	Runtime struct {
		Containerd struct {
			DefaultRuntimeName string             `toml:"default_runtime_name"`
			Runtimes           map[string]Runtime `toml:"runtimes"`
		} `toml:"containerd"`
		IgnoreImageDefinedVolumes bool `toml:"ignore_image_defined_volumes"`
	} `toml:"io.containerd.cri.v1.runtime"`
	Images struct {
		Snapshotter                string         `toml:"snapshotter"`
		DisableSnapshotAnnotations bool           `toml:"disable_snapshot_annotations"`
		DiscardUnpackedLayers      bool           `toml:"discard_unpacked_layers"`
		UseLocalImagePull          bool           `toml:"use_local_image_pull"`
		MaxConcurrentDownloads     int            `toml:"max_concurrent_downloads"`
		ImagePullWithSyncFs        bool           `toml:"image_pull_with_sync_fs"`
		ImagePullProgressTimeout   string         `toml:"image_pull_progress_timeout"`
		Registry                   RegistryConfig `toml:"registry"`
		RuntimePlatforms           map[string]struct {
			Snapshotter string `toml:"snapshotter"`
		} `toml:"runtime_platforms"`
	} `toml:"io.containerd.cri.v1.images"`
	Transfer struct {
		UnpackConfig []struct {
			Snapshotter string `toml:"snapshotter"`
		} `toml:"unpack_config"`
	} `toml:"io.containerd.transfer.v1.local"`
	GRPC struct {
		Address string `toml:"address"`
	} `toml:"io.containerd.server.v1.grpc"`
}

// RegistryConfig is how CRI reaches registries.
type RegistryConfig struct {
	ConfigPath string `toml:"config_path"`
	Mirrors    map[string]struct {
		Endpoints []string `toml:"endpoint"`
	} `toml:"mirrors"`
	Configs map[string]any      `toml:"configs"`
	Auths   map[string]any      `toml:"auths"`
	Headers map[string][]string `toml:"headers"`
}

// Paths are the directories in which containerd looks for a registry's
// configuration; none when it has mirrors of the older kind (plugins/cri/images).
func (r RegistryConfig) Paths() []string {
	paths := r.ConfigPath
	if paths == "" && len(r.Mirrors) == 0 {
		paths = "/etc/containerd/certs.d:/etc/docker/certs.d"
	}
	return filepath.SplitList(paths)
}

// Runtime is a runtime handler.
type Runtime struct {
	Type        string         `toml:"runtime_type"`
	Path        string         `toml:"runtime_path"`
	Options     map[string]any `toml:"options"`
	Snapshotter string         `toml:"snapshotter"`
	// Sandboxer says who makes a pod's sandbox: containerd, as a container of the
	// pause image ("podsandbox", the default), or the shim ("shim").
	Sandboxer             string `toml:"sandboxer"`
	DisablePauseImagePull bool   `toml:"disable_pause_image_pull"`
	// DisableLayerFetch exists in a containerd with the patch of that name.
	DisableLayerFetch bool `toml:"disable_layer_fetch"`
	// KeepImageDefinedVolumes and UnresolvedUsers likewise.
	KeepImageDefinedVolumes bool   `toml:"keep_image_defined_volumes"`
	UnresolvedUsers         string `toml:"unresolved_users"`
}

const sandboxerShim = "shim"

// configPath is the configuration of the runtime that the handler names, or "".
func (r Runtime) configPath() string {
	p, _ := r.Options["ConfigPath"].(string)
	return p
}

// ParseConfig reads an effective configuration as `containerd config dump` prints
// it.
func ParseConfig(text []byte) (*Config, error) {
	var c Config
	if err := toml.Unmarshal(text, &c); err != nil {
		return nil, fmt.Errorf("read containerd's effective configuration: %w", err)
	}
	return &c, nil
}

// localPull says whether CRI pulls by itself and not through the transfer
// service. containerd falls back to that for keys which the transfer service does
// not have (internal/cri/config/config.go, CheckLocalImagePullConfigs).
func (c *Config) localPull() bool {
	i := c.Plugins.Images
	return i.UseLocalImagePull || !i.DisableSnapshotAnnotations || i.DiscardUnpackedLayers || i.ImagePullWithSyncFs ||
		i.MaxConcurrentDownloads != 3 || len(i.Registry.Mirrors)+len(i.Registry.Configs)+len(i.Registry.Auths) > 0
}

// EffectiveSnapshotter is the snapshotter that a handler's containers get.
func (c *Config) EffectiveSnapshotter(r Runtime) string {
	if r.Snapshotter != "" {
		return r.Snapshotter
	}
	return c.Plugins.Images.Snapshotter
}

// snapshotterRoot is the directory of the snapshotter.
func (c *Config) snapshotterRoot() string {
	if p := c.Plugins.Snapshotter.RootPath; p != "" {
		return p
	}
	return c.Root + "/" + PluginURI
}
