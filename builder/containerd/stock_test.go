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

// The tests in this file compare with containerd as it is released, out of the
// module cache. A source archive, which has only the patched one, is without them.
package main

import (
	"debug/buildinfo"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A drop-in replacement has to be made of the same packages as stock
// containerd: every builtin, each at the version that containerd pins. A
// dependency of ours that raised one would silently ship another containerd.
func TestSamePackagesAsStock(t *testing.T) {
	const format = "{{if not .Standard}}{{.ImportPath}}{{end}}"
	packages := map[string]bool{}
	for p := range strings.FieldsSeq(output(t, "go", "list", "-deps", "-f", format, ".")) {
		packages[p] = true
	}
	stock := strings.Fields(output(t, "go", "list", "-deps", "-f", format, containerdModule+"/cmd/containerd"))
	require.Greater(t, len(stock), 500)
	for _, p := range stock {
		if p != containerdModule+"/cmd/containerd" {
			assert.True(t, packages[p], "stock containerd has package %s", p)
		}
	}

	var pinned struct {
		Require []struct{ Path, Version string }
		Replace []any
	}
	dir := strings.TrimSpace(output(t, "go", "list", "-m", "-f", "{{.Dir}}", containerdModule))
	require.NoError(t, json.Unmarshal([]byte(output(t, "go", "mod", "edit", "-json", filepath.Join(dir, "go.mod"))), &pinned))
	require.Empty(t, pinned.Replace, "what containerd replaces has to be replaced here")
	versions := map[string]string{}
	for _, r := range pinned.Require {
		versions[r.Path] = r.Version
	}
	info, err := buildinfo.ReadFile(build(t, ours))
	require.NoError(t, err)
	for _, m := range info.Deps {
		// Containerd 2.3 has version 2 of it, and our commands version 3 (app_2_3.go).
		own := m.Path == "github.com/urfave/cli/v3" && versions["github.com/urfave/cli/v2"] != "" && versions[m.Path] == ""
		if m.Path != containerdModule && !own {
			assert.Equal(t, versions[m.Path], m.Version, m.Path)
		}
	}
}

// What the binary adds to the default configuration is its plugin's section and
// the transfer service's list, whose first entries containerd keeps to itself.
func TestDefaultConfig(t *testing.T) {
	got := parseConfig(t, output(t, build(t, ours), "config", "default"))
	stock := parseConfig(t, output(t, build(t, containerdModule+"/cmd/containerd"), "config", "default"))

	plugins := got["plugins"].(map[string]any)
	assert.Equal(t, map[string]any{
		"root_path":                 "",
		"mount_type":                "fuse.nydus-overlayfs-guest-pull",
		"sync_remove":               false,
		"mount_options":             []any{},
		"resolve_users":             "off",
		"resolve_users_concurrency": int64(2),
	}, plugins["io.containerd.snapshotter.v1.guest-pull"])
	delete(plugins, "io.containerd.snapshotter.v1.guest-pull")

	transfer := plugins["io.containerd.transfer.v1.local"].(map[string]any)
	var snapshotters []any
	for _, u := range transfer["unpack_config"].([]any) {
		snapshotters = append(snapshotters, u.(map[string]any)["snapshotter"])
	}
	assert.Equal(t, []any{"overlayfs", "erofs", "guest-pull"}, snapshotters)
	delete(transfer, "unpack_config")

	assert.Equal(t, stock, got)
}

// containerd's own default list is not exported, so this binary repeats it. A
// containerd with another default must be noticed.
func TestUnpackConfigFollowsStock(t *testing.T) {
	dir := strings.TrimSpace(output(t, "go", "list", "-m", "-f", "{{.Dir}}", containerdModule))
	b, err := os.ReadFile(filepath.Join(dir, "plugins", "transfer", "plugin_defaults_linux.go"))
	require.NoError(t, err)
	var fields []string
	for _, m := range regexp.MustCompile(`(?m)^\t\t\t(\w+): +(.*),$`).FindAllStringSubmatch(string(b), -1) {
		fields = append(fields, m[1]+": "+m[2])
	}
	assert.Equal(t, []string{
		"Platform: platforms.Format(platforms.DefaultSpec())", "Snapshotter: defaults.DefaultSnapshotter", "Differ: defaults.DefaultDiffer",
		"Platform: platforms.FormatAll(erofsPlatformSpec())", `Snapshotter: "erofs"`, `Differ: "erofs"`, "Optional: true",
	}, fields)
}
