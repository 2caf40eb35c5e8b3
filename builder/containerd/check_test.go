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
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

type report struct {
	OK       bool
	Handlers []struct{ Name, Shim, Flavour string }
	Findings []struct{ Severity, Check, Problem string }
}

func (r report) find(check string) (problems []string) {
	for _, f := range r.Findings {
		if f.Check == check {
			problems = append(problems, f.Problem)
		}
	}
	return problems
}

// runCheck runs the command on a configuration, in an environment that has
// nothing but the mount helpers, and returns its report and exit code.
func runCheck(t *testing.T, config string, args ...string) (report, int) {
	t.Helper()
	dir := t.TempDir()
	for _, p := range []string{"mount.fuse", "nydus-overlayfs-guest-pull"} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, p), nil, 0o755))
	}
	socket := filepath.Join(dir, "c.sock")
	cmd := exec.Command(build(t, ours), append([]string{"--config", config, "--address", socket, "--root", filepath.Join(dir, "root"), "guest-pull", "check", "--json"}, args...)...)
	cmd.Env = []string{"PATH=" + dir}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		require.NoError(t, err)
	}
	var r report
	require.NoError(t, json.Unmarshal(out, &r), "%s%s", out, stderr.String())
	assert.Empty(t, stderr.String())
	return r, cmd.ProcessState.ExitCode()
}

func writeFile(t *testing.T, path, text string) string {
	t.Helper()
	require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

// Each version of the configuration is read as containerd migrates it. Every one
// of these maps the handler "guest" to the snapshotter, and leaves the
// snapshotter out of unpack_config.
func TestCheckConfigVersions(t *testing.T) {
	shim := writeFile(t, filepath.Join(t.TempDir(), "containerd-shim-kata-x-v2"), "")
	for name, config := range map[string]string{
		"2": `version = 2
[plugins."io.containerd.grpc.v1.cri"]
  ignore_image_defined_volumes = true
[plugins."io.containerd.grpc.v1.cri".containerd]
  discard_unpacked_layers = true
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.guest]
  runtime_type = "io.containerd.kata-x.v2"
  runtime_path = "` + shim + `"
  snapshotter = "guest-pull"
[plugins."io.containerd.grpc.v1.cri".registry.mirrors."docker.io"]
  endpoint = ["https://mirror.example"]
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux/amd64"
  snapshotter = "overlayfs"
`,
		"3": `version = 3
[plugins.'io.containerd.cri.v1.runtime']
  ignore_image_defined_volumes = true
[plugins.'io.containerd.cri.v1.images']
  discard_unpacked_layers = true
[plugins.'io.containerd.cri.v1.images'.registry.mirrors."docker.io"]
  endpoint = ["https://mirror.example"]
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.guest]
  runtime_type = "io.containerd.kata-x.v2"
  runtime_path = "` + shim + `"
  snapshotter = "guest-pull"
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = "linux/amd64"
  snapshotter = "overlayfs"
`,
		"4": `version = 4
[plugins.'io.containerd.cri.v1.runtime']
  ignore_image_defined_volumes = true
[plugins.'io.containerd.cri.v1.images']
  discard_unpacked_layers = true
[plugins.'io.containerd.cri.v1.images'.registry.mirrors."docker.io"]
  endpoint = ["https://mirror.example"]
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.guest]
  runtime_type = "io.containerd.kata-x.v2"
  runtime_path = "` + shim + `"
  snapshotter = "guest-pull"
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = "linux/amd64"
  snapshotter = "overlayfs"
`,
	} {
		t.Run(name, func(t *testing.T) {
			r, code := runCheck(t, writeFile(t, filepath.Join(t.TempDir(), "config.toml"), config))
			require.Len(t, r.Handlers, 1)
			assert.Equal(t, "guest", r.Handlers[0].Name)
			assert.Equal(t, shim, r.Handlers[0].Shim)
			assert.Len(t, r.find("unpack-config"), 1)
			assert.Len(t, r.find("discard-unpacked-layers"), 1)
			assert.Len(t, r.find("mirrors"), 1)
			assert.Empty(t, r.find("image-volumes"))
			assert.Empty(t, r.find("mount-helper"))
			assert.Len(t, r.find("daemon"), 1)
			assert.True(t, r.OK, "%+v", r.Findings)
			assert.Zero(t, code)
		})
	}
}

// An imported file counts, a key that does not exist is told, and what breaks a
// pod is told by the exit code.
func TestCheckImportsAndExitCode(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "50-handler.toml"), `version = 3
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.guest]
  runtime_type = "io.containerd.kata-nowhere.v2"
  snapshotter = "guest-pull"
[plugins.'io.containerd.snapshotter.v1.guest-pull']
  mount_typ = "fuse.x"
`)
	config := writeFile(t, filepath.Join(dir, "config.toml"), "version = 4\nimports = [\"50-*.toml\"]\n")
	r, code := runCheck(t, config)
	assert.False(t, r.OK)
	assert.Equal(t, 1, code)
	require.Len(t, r.find("shim"), 1)
	assert.Contains(t, r.find("shim")[0], "containerd-shim-kata-nowhere-v2 is not found")
	require.Len(t, r.find("unknown-key"), 1)
	assert.Contains(t, r.find("unknown-key")[0], "[plugins.'io.containerd.snapshotter.v1.guest-pull']: mount_typ")
	assert.Empty(t, r.find("unpack-config"), "the built-in default has the snapshotter")

	cmd := exec.Command(build(t, ours), "--config", config, "--address", filepath.Join(dir, "x"), "guest-pull", "check")
	out, err := cmd.CombinedOutput()
	require.Error(t, err)
	assert.Equal(t, 1, cmd.ProcessState.ExitCode())
	assert.Contains(t, string(out), "containerd-shim-kata-nowhere-v2 is not found")
}

// `containerd config dump` panics with a proxy plugin of the snapshotter's name,
// as does containerd itself. The check says what to do.
func TestCheckProxyPluginOfSameName(t *testing.T) {
	config := writeFile(t, filepath.Join(t.TempDir(), "config.toml"), `version = 2
[proxy_plugins.guest-pull]
  type = "snapshot"
  address = "/run/containerd-guest-pull-grpc/containerd-guest-pull-grpc.sock"
`)
	r, code := runCheck(t, config)
	assert.Len(t, r.find("proxy-plugin"), 1)
	assert.Equal(t, 1, code)

	out, err := exec.Command(build(t, ours), "--config", config, "config", "dump").CombinedOutput()
	require.Error(t, err)
	assert.Contains(t, string(out), "id already registered", "the reason that the finding gives")
}

func TestCheckBrokenConfig(t *testing.T) {
	for name, text := range map[string]string{
		"syntax":      "version = ",
		"too new":     "version = 99\n",
		"wrong type":  "version = 4\n[plugins.'io.containerd.snapshotter.v1.guest-pull']\nsync_remove = 7\n",
		"disabled v1": "version = 4\ndisabled_plugins = [\"cri\"]\n",
	} {
		t.Run(name, func(t *testing.T) {
			r, code := runCheck(t, writeFile(t, filepath.Join(t.TempDir(), "config.toml"), text))
			assert.Len(t, r.find("config"), 1)
			assert.Equal(t, 1, code)
		})
	}
	r, code := runCheck(t, filepath.Join(t.TempDir(), "nowhere.toml"))
	assert.Len(t, r.find("config"), 1, "containerd refuses a --config that is not there")
	assert.Equal(t, 1, code)
}

func TestStatusWithoutContainerd(t *testing.T) {
	out, err := exec.Command(build(t, ours), "--address", filepath.Join(t.TempDir(), "c.sock"), "guest-pull", "status").CombinedOutput()
	require.Error(t, err)
	assert.Contains(t, string(out), "--address")
}
