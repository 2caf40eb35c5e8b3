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

package packagetest

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"github.com/pelletier/go-toml/v2"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	guestpull "github.com/guest-pull/guest-pull-snapshotter/plugin"
)

const pluginURI = "io.containerd.snapshotter.v1.guest-pull"

// What the drop-in shows in comments has to be what is in force without it, or a
// user who takes a "#" away changes more than that line says. All keys are there.
func TestDropInShowsTheDefaults(t *testing.T) {
	b, err := os.ReadFile("50-guest-pull.toml")
	require.NoError(t, err)

	var active map[string]any
	require.NoError(t, toml.Unmarshal(b, &active))
	assert.Equal(t, map[string]any{"version": int64(3)}, active, "nothing else is set")

	var shown strings.Builder
	setting := regexp.MustCompile(`^# *(\[plugins\..*\]|[A-Za-z_]+ = .*)$`)
	for line := range strings.Lines(string(b)) {
		if m := setting.FindStringSubmatch(strings.TrimSuffix(line, "\n")); m != nil && !strings.HasPrefix(m[1], "imports") {
			shown.WriteString(m[1] + "\n")
		}
	}
	var config struct {
		Plugins map[string]any `toml:"plugins"`
	}
	require.NoError(t, toml.Unmarshal([]byte(shown.String()), &config), shown.String())

	var want map[string]any
	for _, r := range registry.Graph(func(*plugin.Registration) bool { return false }) {
		if r.URI() == pluginURI {
			require.IsType(t, &guestpull.Config{}, r.Config)
			b, err := toml.Marshal(r.Config)
			require.NoError(t, err)
			require.NoError(t, toml.Unmarshal(b, &want))
		}
	}
	require.NotEmpty(t, want)
	// Lists of the administrator's own, which have no default to show.
	delete(want, "users")
	delete(want, "groups")
	got, ok := config.Plugins[pluginURI].(map[string]any)
	require.True(t, ok)
	for key, v := range want {
		if list, ok := v.([]any); ok && len(list) == 0 {
			want[key] = []any{}
		}
	}
	assert.Equal(t, want, got)

	runtimes := config.Plugins["io.containerd.cri.v1.runtime"].(map[string]any)["containerd"].(map[string]any)["runtimes"].(map[string]any)
	require.NotEmpty(t, runtimes)
	for name, r := range runtimes {
		assert.Equal(t, "guest-pull", r.(map[string]any)["snapshotter"], name)
		assert.Equal(t, "io.containerd."+name+".v2", r.(map[string]any)["runtime_type"], name)
	}
}
