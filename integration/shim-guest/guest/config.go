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

package guest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
)

// ConfigEnv is the environment variable of containerd that names the guest's
// configuration file. The runtime option ConfigPath wins over it.
const ConfigEnv = "GUEST_CONFIG"

// Flavour is the Kata shim that is stood in for.
type Flavour string

const (
	// FlavourGo is the Go shim, 3.9 and later. It is the default.
	FlavourGo Flavour = "go"
	// FlavourRust is runtime-rs.
	FlavourRust Flavour = "rust"
)

// Config is what the guest is configured with: a JSON file, which is read for
// each container that is created.
type Config struct {
	// Flavour defaults to FlavourGo.
	Flavour Flavour `json:"flavour,omitempty"`

	// Idle makes a guest that does nothing: each container is created, started and
	// ended in name only. It is for measurements of what containerd does itself.
	Idle bool `json:"idle,omitempty"`

	// RecordDir is an absolute path where each created container leaves a
	// Record, at <namespace>/<container ID>.json. Empty: no records.
	RecordDir string `json:"record_dir,omitempty"`

	// RuncRoot is an absolute path where runc keeps the state of the
	// containers. Empty: containerd's default, which is the same for every
	// containerd of the machine.
	RuncRoot string `json:"runc_root,omitempty"`

	// SystemdCgroup makes runc ask systemd for the containers' cgroups, as the
	// option SystemdCgroup of the runc shim does.
	SystemdCgroup bool `json:"systemd_cgroup,omitempty"`

	// PullTimeout bounds the pull of one image, unpacking included. Zero is
	// five minutes. In JSON it is a string as time.ParseDuration reads it.
	PullTimeout Duration `json:"pull_timeout,omitempty"`

	// CAFile names a file of PEM certificates that are trusted in addition to
	// the system's.
	CAFile string `json:"ca_file,omitempty"`

	// Registries holds what differs by registry, by host name with port, as
	// it stands in an image's name ("index.docker.io" for Docker's).
	Registries map[string]Registry `json:"registries,omitempty"`

	// CDHConfig names a file as the Confidential Data Hub of a real guest has one,
	// cdh.toml, whose section [image] takes the place of CAFile and Registries.
	// Init data of the pod wins over it.
	CDHConfig string `json:"cdh_config,omitempty"`

	// IgnoreChainID makes the guest log, and not refuse, an image whose manifest
	// or chain ID is not the one that the host resolved.
	IgnoreChainID bool `json:"ignore_chain_id,omitempty"`
}

// Registry is the configuration of one registry. A registry on a loopback
// address needs none to be reached over plain HTTP.
type Registry struct {
	Username  string `json:"username,omitempty"`
	Password  string `json:"password,omitempty"`
	PlainHTTP bool   `json:"plain_http,omitempty"`
}

// Duration is a time.Duration that is a string in JSON.
type Duration time.Duration

// MarshalText writes the duration as time.Duration's String does.
func (d Duration) MarshalText() ([]byte, error) {
	return []byte(time.Duration(d).String()), nil
}

// UnmarshalText reads what time.ParseDuration reads, greater than zero.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return err
	}
	if v <= 0 {
		return fmt.Errorf("duration %q is not positive", b)
	}
	*d = Duration(v)
	return nil
}

const defaultPullTimeout = 5 * time.Minute

// LoadConfig reads a configuration. No path gives the defaults. A file that
// cannot be read, or that has an unknown key or a wrong value, is refused with
// errdefs.ErrInvalidArgument.
func LoadConfig(path string) (Config, error) {
	var c Config
	if path != "" {
		b, err := os.ReadFile(path)
		if err != nil {
			return Config{}, fmt.Errorf("read the guest's configuration: %w: %w", errdefs.ErrInvalidArgument, err)
		}
		dec := json.NewDecoder(bytes.NewReader(b))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&c); err != nil {
			return Config{}, fmt.Errorf("read the guest's configuration %s: %w: %w", path, errdefs.ErrInvalidArgument, err)
		}
		if _, err := dec.Token(); !errors.Is(err, io.EOF) {
			return Config{}, fmt.Errorf("read the guest's configuration %s: %w: there is more than one JSON value", path, errdefs.ErrInvalidArgument)
		}
	}
	switch c.Flavour {
	case "":
		c.Flavour = FlavourGo
	case FlavourGo, FlavourRust:
	default:
		return Config{}, fmt.Errorf("guest's configuration %s: %w: flavour is %q, want %q or %q",
			path, errdefs.ErrInvalidArgument, c.Flavour, FlavourGo, FlavourRust)
	}
	for key, dir := range map[string]string{"record_dir": c.RecordDir, "runc_root": c.RuncRoot} {
		if dir != "" && !filepath.IsAbs(dir) {
			return Config{}, fmt.Errorf("guest's configuration %s: %w: %s %q is not an absolute path",
				path, errdefs.ErrInvalidArgument, key, dir)
		}
	}
	if c.PullTimeout == 0 {
		c.PullTimeout = Duration(defaultPullTimeout)
	}
	return c, nil
}
