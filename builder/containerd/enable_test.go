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
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/pelletier/go-toml/v2"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/guest-pull/guest-pull-snapshotter/builder/enable"
)

// configured is a node's configuration in a directory of its own, with programs
// that stand for what a handler needs.
type configured struct {
	t      *testing.T
	dir    string
	config string
}

func newConfigured(t *testing.T, files map[string]string) *configured {
	t.Helper()
	n := &configured{t: t, dir: t.TempDir()}
	n.config = filepath.Join(n.dir, "etc/config.toml")
	for _, p := range []string{"mount.fuse", "nydus-overlayfs-guest-pull", "containerd-shim-kata-a-v2", "containerd-shim-kata-b-v2"} {
		n.write("bin/"+p, "")
		require.NoError(t, os.Chmod(filepath.Join(n.dir, "bin", p), 0o755))
	}
	for path, text := range files {
		n.write(path, text)
	}
	return n
}

func (n *configured) write(path, text string) {
	n.t.Helper()
	path = filepath.Join(n.dir, path)
	require.NoError(n.t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(n.t, os.WriteFile(path, []byte(strings.ReplaceAll(text, "DIR", n.dir)), 0o600))
}

// files returns the configuration as it is on the disk.
func (n *configured) files() map[string]string {
	n.t.Helper()
	found := map[string]string{}
	require.NoError(n.t, fs.WalkDir(os.DirFS(n.dir), ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.HasPrefix(path, "bin/") {
			return err
		}
		text, err := os.ReadFile(filepath.Join(n.dir, path))
		found[path] = string(text)
		return err
	}))
	return found
}

func (n *configured) run(args ...string) (string, error) {
	n.t.Helper()
	cmd := exec.Command(build(n.t, ours), append([]string{"--config", n.config, "--address", filepath.Join(n.dir, "c.sock"), "--root", filepath.Join(n.dir, "root"), "guest-pull"}, args...)...)
	cmd.Env = []string{"PATH=" + filepath.Join(n.dir, "bin")}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		require.NoError(n.t, err)
	}
	return string(out), err
}

func (n *configured) must(args ...string) string {
	n.t.Helper()
	out, err := n.run(args...)
	require.NoError(n.t, err, out)
	return out
}

// handlers asks containerd itself for its handlers: type and snapshotter.
func (n *configured) handlers() map[string]string {
	n.t.Helper()
	out, err := exec.Command(build(n.t, ours), "--config", n.config, "config", "dump").Output()
	require.NoError(n.t, err)
	var c struct {
		Plugins struct {
			Runtime struct {
				Containerd struct {
					Runtimes map[string]struct {
						Type        string         `toml:"runtime_type"`
						Snapshotter string         `toml:"snapshotter"`
						Options     map[string]any `toml:"options"`
					}
				}
			} `toml:"io.containerd.cri.v1.runtime"`
			Images struct {
				RuntimePlatforms map[string]struct {
					Platform    string
					Snapshotter string
				} `toml:"runtime_platforms"`
			} `toml:"io.containerd.cri.v1.images"`
		}
	}
	require.NoError(n.t, toml.Unmarshal(out, &c))
	found := map[string]string{}
	for name, r := range c.Plugins.Runtime.Containerd.Runtimes {
		found[name] = fmt.Sprint(r.Type, " ", r.Snapshotter)
		if p, ok := r.Options["ConfigPath"]; ok {
			found[name] += strings.ReplaceAll(fmt.Sprint(" ", p), n.dir, "DIR")
		}
		if p, ok := c.Plugins.Images.RuntimePlatforms[name]; ok {
			found[name] += fmt.Sprint(" ", p.Platform, " ", p.Snapshotter)
		}
	}
	delete(found, "runc")
	return found
}

const (
	dropInFile = "etc/conf.d/" + enable.DropIn
	lateFile   = "etc/conf.d/" + enable.Late

	mainV2 = `# Kept as it is.
version = 2
imports = ["conf.d/*.toml", "DIR/kata/*.toml"]
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata-a]
  runtime_type = "io.containerd.kata-a.v2"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata-a.options]
    ConfigPath = "DIR/kata.toml"
`
	kataDeploy = `version = 3
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata-b]
  runtime_type = "io.containerd.kata-b.v2"
  snapshotter = "nydus"
[plugins.'io.containerd.cri.v1.images'.runtime_platforms.kata-b]
  platform = "linux/amd64"
  snapshotter = "nydus"
`
)

// Handlers from the main file and from one of kata-deploy's, which is imported
// later and would win, are turned on and off again, in any order, with nothing else
// changed; each file is what it was in the end.
func TestEnableAndDisable(t *testing.T) {
	n := newConfigured(t, map[string]string{"etc/config.toml": mainV2, "kata/kata-deploy.toml": kataDeploy, "kata.toml": ""})
	before := n.files()
	off := map[string]string{"kata-a": "io.containerd.kata-a.v2  DIR/kata.toml", "kata-b": "io.containerd.kata-b.v2 nydus linux/amd64 nydus"}
	require.Equal(t, off, n.handlers())

	out := n.must("enable", "--dry-run", "kata-a")
	assert.Contains(t, out, "+ snapshotter = 'guest-pull'")
	assert.Contains(t, out, "handler kata-a: snapshotter overlayfs -> guest-pull")
	assert.Contains(t, out, "kata-a", "the handler is in the table of the check")
	require.Equal(t, before, n.files(), "a dry run")

	out = n.must("enable", "kata-a")
	assert.Contains(t, out, "0 errors")
	assert.Contains(t, out, "systemctl restart containerd.service")
	require.Equal(t, "io.containerd.kata-a.v2 guest-pull DIR/kata.toml", n.handlers()["kata-a"])
	require.Equal(t, off["kata-b"], n.handlers()["kata-b"])
	once := n.files()
	assert.Contains(t, n.must("enable", "kata-a"), "nothing to change")
	require.Equal(t, once, n.files())

	out = n.must("enable", "kata-b", "kata-b")
	// One that is killed in between leaves no import of a file that is not there.
	require.Less(t, strings.Index(out, enable.Late), strings.Index(out, enable.DropIn))
	require.Equal(t, map[string]string{
		"kata-a": "io.containerd.kata-a.v2 guest-pull DIR/kata.toml",
		"kata-b": "io.containerd.kata-b.v2 guest-pull linux/amd64 guest-pull",
	}, n.handlers())
	require.Contains(t, n.files(), lateFile)

	n.must("enable", "--runtime-type", "io.containerd.kata-b.v2", "--kata-config", filepath.Join(n.dir, "kata.toml"), "kata-c")
	require.Equal(t, "io.containerd.kata-b.v2 guest-pull DIR/kata.toml", n.handlers()["kata-c"])
	assert.Contains(t, n.must("enable", "kata-c"), "nothing to change", "one that it made itself")
	// A path is that of the command's directory, and the shim has another.
	t.Chdir(n.dir)
	assert.Contains(t, n.must("enable", "--runtime-type", "io.containerd.kata-b.v2", "--kata-config", "kata.toml", "kata-c"), "nothing to change")

	out = n.must("disable", "kata-b")
	require.Less(t, strings.Index(out, enable.DropIn), strings.Index(out, enable.Late))
	require.NotContains(t, n.files(), lateFile)
	require.Equal(t, off["kata-b"], n.handlers()["kata-b"])
	require.Equal(t, "io.containerd.kata-a.v2 guest-pull DIR/kata.toml", n.handlers()["kata-a"])
	n.must("disable")
	require.Equal(t, before, n.files())
	require.Equal(t, off, n.handlers())
	assert.Contains(t, n.must("disable"), "nothing to change")
}

// Several at once take turns, and none undoes what another has done.
func TestEnableAtOnce(t *testing.T) {
	text, want := "version = 3\nimports = [\"conf.d/*.toml\"]\n", map[string]string{}
	for i := range 6 {
		text += fmt.Sprintf("[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata-%d]\n  runtime_type = \"io.containerd.kata-a.v2\"\n", i)
		want[fmt.Sprintf("kata-%d", i)] = "io.containerd.kata-a.v2 guest-pull"
	}
	n := newConfigured(t, map[string]string{"etc/config.toml": text})
	build(t, ours)
	var running sync.WaitGroup
	for name := range want {
		running.Go(func() {
			out, err := n.run("enable", name)
			assert.NoError(t, err, out)
		})
	}
	running.Wait()
	require.Equal(t, want, n.handlers())
	n.must("disable")
	require.Equal(t, map[string]string{"etc/config.toml": text}, n.files())
}

// What cannot be done changes nothing and says why, and what to do.
func TestEnableRefuses(t *testing.T) {
	const foreign = "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata-a]\n  snapshotter = \"guest-pull\"\n  cni_conf_dir = \"/x\"\n"
	for name, c := range map[string]struct {
		files map[string]string
		args  []string
		says  string
	}{
		"no handler":            {args: []string{"enable"}, says: "no handler is named"},
		"unknown handler":       {args: []string{"enable", "kata-x"}, says: "this node has kata-a, kata-b, runc"},
		"one of two is unknown": {args: []string{"enable", "kata-a", "kata-x"}, says: `no handler "kata-x"`},
		"another type":          {args: []string{"enable", "--runtime-type", "io.containerd.kata.v2", "kata-a"}, says: `has runtime_type "io.containerd.kata-a.v2"`},
		"bad name":              {args: []string{"enable", "--runtime-type", "io.containerd.kata-a.v2", "Kata A"}, says: "cannot be the name of a handler"},
		"a table in the name":   {args: []string{"enable", "--runtime-type", "io.containerd.kata-a.v2", "x]\n[y"}, says: "cannot be the name of a handler"},
		"Kata's configuration of one that exists": {args: []string{"enable", "--kata-config", "/other.toml", "kata-a"}, says: "etc/config.toml), not by this command"},
		"an import that is gone": {files: map[string]string{"etc/config.toml": strings.ReplaceAll(mainV2, "conf.d/*.toml", "gone.toml")},
			args: []string{"enable", "kata-a"}, says: "cannot load its configuration as it is"},
		"runc":    {args: []string{"enable", "runc"}, says: "runc has no guest"},
		"no shim": {args: []string{"enable", "--runtime-type", "io.containerd.kata-x.v2", "kata-x"}, says: "containerd-shim-kata-x-v2 is not found"},
		"no TOML": {files: map[string]string{"etc/config.toml": "version = "}, args: []string{"enable", "kata-a"}, says: "cannot load its configuration"},
		"broken drop-in": {files: map[string]string{"etc/conf.d/x.toml": "version = 3\nroot = 7\n"},
			args: []string{"enable", "kata-a"}, says: "cannot load its configuration"},
		"not imported": {files: map[string]string{"etc/config.toml": strings.ReplaceAll(mainV2, `"conf.d/*.toml", `, "")},
			args: []string{"enable", "kata-a"}, says: "--import"},
		"edited": {files: map[string]string{dropInFile: foreign}, args: []string{"enable", "kata-b"}, says: "was changed since"},
		"not ours": {files: map[string]string{"etc/conf.d/50-x.toml": foreign},
			args: []string{"disable", "kata-a"}, says: "50-x.toml"},
		"not on": {args: []string{"disable", "kata-a"}, says: "it is not on"},
		"another file wins": {files: map[string]string{
			"kata/kata-deploy.toml": strings.Replace(kataDeploy, "version = 3", "version = 3\nimports = [\"deeper/*.toml\"]", 1),
			"kata/deeper/a.toml":    "version = 3\nimports = [\"b.toml\"]\n",
			"kata/deeper/b.toml":    kataDeploy,
		}, args: []string{"enable", "kata-b"}, says: "kata/deeper/b.toml"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newConfigured(t, map[string]string{"etc/config.toml": mainV2, "kata/kata-deploy.toml": kataDeploy, "kata.toml": ""})
			for path, text := range c.files {
				n.write(path, text)
			}
			before := n.files()
			out, err := n.run(c.args...)
			require.Error(t, err, out)
			assert.Contains(t, out, c.says)
			assert.NotContains(t, out, os.TempDir()+"/guest-pull-", "where it was tried")
			assert.Equal(t, before, n.files())
		})
	}
}

// The import of conf.d is seen to: with --import in a file that has none, and in
// one that has some; and a config.toml is made where there is none. All of it is
// taken back.
func TestEnableImports(t *testing.T) {
	const handler = "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata-a]\n  runtime_type = \"io.containerd.kata-a.v2\"\n"
	for name, text := range map[string]string{
		"none":           "# first\nversion = 3 # second\n\n" + handler,
		"empty":          "version = 3\nimports = []\n" + handler,
		"several lines":  "version = 3\n  imports = [ # some\n  \"DIR/other/*.toml\",\n]\n" + handler,
		"in a table":     "version = 3\n" + handler + "  imports = [\"x\"]\n",
		"quoted, inline": "version = 3\n\"imports\" = ['DIR/other/*.toml']\n" + handler,
	} {
		t.Run(name, func(t *testing.T) {
			n := newConfigured(t, map[string]string{"etc/config.toml": text, "etc/conf.d/99-not-read.toml": "version = 3\nroot = \"/nowhere\"\n"})
			before := n.files()
			out, err := n.run("enable", "kata-a")
			require.Error(t, err)
			assert.Contains(t, out, "60-guest-pull-handlers*.toml", "what to add")
			require.Equal(t, before, n.files())
			n.must("enable", "--import", "kata-a")
			require.Equal(t, "io.containerd.kata-a.v2 guest-pull", n.handlers()["kata-a"])
			after := n.files()
			assert.NotEqual(t, before["etc/config.toml"], after["etc/config.toml"])
			n.must("disable", "kata-a")
			require.Equal(t, before, n.files())
		})
	}
	t.Run("no file", func(t *testing.T) {
		n := newConfigured(t, nil)
		n.must("enable", "--runtime-type", "io.containerd.kata-a.v2", "kata-a")
		require.Equal(t, "io.containerd.kata-a.v2 guest-pull", n.handlers()["kata-a"])
		n.must("disable")
		require.Empty(t, n.files())
	})
}
