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
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"github.com/pelletier/go-toml/v2"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const (
	containerdModule = "github.com/containerd/containerd/v2"
	ours             = "."
)

func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	require.NoError(t, err, "%s %s: %s", name, strings.Join(args, " "), stderr.String())
	return string(out)
}

// binaries holds what the tests build, once.
var binaries string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "builder")
	if err != nil {
		panic(err)
	}
	binaries = dir
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

func build(t *testing.T, pkg string) string {
	t.Helper()
	bin := filepath.Join(binaries, "containerd-"+filepath.Base(pkg))
	if _, err := os.Stat(bin); err != nil {
		output(t, "go", "build", "-o", bin, pkg)
	}
	return bin
}

func parseConfig(t *testing.T, s string) map[string]any {
	t.Helper()
	var m map[string]any
	require.NoError(t, toml.Unmarshal([]byte(s), &m))
	return m
}

// A user's own list has to win, whole: an entry of ours left in it would unpack
// with a snapshotter that the user took out.
func TestUserUnpackConfigWins(t *testing.T) {
	config := filepath.Join(t.TempDir(), "config.toml")
	require.NoError(t, os.WriteFile(config, []byte(`version = 4
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = "linux/amd64"
  snapshotter = "native"
`), 0o600))
	dump := parseConfig(t, output(t, build(t, ours), "--config", config, "config", "dump"))
	transfer := dump["plugins"].(map[string]any)["io.containerd.transfer.v1.local"].(map[string]any)
	list := transfer["unpack_config"].([]any)
	require.Len(t, list, 1)
	assert.Equal(t, "native", list[0].(map[string]any)["snapshotter"])
}

func TestAddUnpackConfigNeedsTransferService(t *testing.T) {
	all := func(*plugin.Registration) bool { return false }
	require.NoError(t, addUnpackConfig(registry.Graph(all)))
	require.NoError(t, addUnpackConfig(registry.Graph(all)), "twice is as good as once")
	assert.ErrorContains(t, addUnpackConfig(nil), "io.containerd.transfer.v1.local")
}
