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

package users

import (
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestStatic(t *testing.T) {
	files, err := Static(
		map[string]string{"nginx": "101:102", "app": "1000"},
		map[string]Group{"adm": {GID: new(int64(4)), Members: []string{"nginx", "root"}}, "nginx": {GID: new(int64(102))}},
	)
	require.NoError(t, err)
	assert.Equal(t, "root:x:0:0::/:\napp:x:1000:0::/:\nnginx:x:101:102::/:\n", string(files.Passwd))
	assert.Equal(t, "root:x:0:\nadm:x:4:nginx,root\nnginx:x:102:\n", string(files.Group))

	files, err = Static(map[string]string{"root": "0:5"}, map[string]Group{"root": {GID: new(int64(5))}})
	require.NoError(t, err)
	assert.Equal(t, "root:x:0:5::/:\n", string(files.Passwd), "root as configured, and once")
	assert.Equal(t, "root:x:5:\n", string(files.Group))
}

// All mistakes are in one error, as an administrator should not have to restart
// containerd for each of them.
func TestStaticRefuses(t *testing.T) {
	bad := map[string]string{
		"":                       "want a name",
		"1000":                   "want a name",
		"+5":                     "want a name",
		"9999999999999999999999": "want a name",
		"#comment":               "want a name without",
		"a:b":                    "want a name without",
		"a,b":                    "want a name without",
		"a b":                    "want a name without",
		"a\nb":                   "want a name without",
	}
	users := map[string]string{"ok": "1"}
	for name := range bad {
		users[name] = "1"
	}
	ids := []string{"", ":", "1:", ":1", "-1", "+1", "01", "0x1", "1:2:3", "2147483648", "1:2147483648", " 1", "nginx"}
	for i, id := range ids {
		users[fmt.Sprintf("user%d", i)] = id
	}
	_, err := Static(users, map[string]Group{
		"nogid":   {},
		"neg":     {GID: new(int64(-1))},
		"big":     {GID: new(int64(1 << 31))},
		"members": {GID: new(int64(1)), Members: []string{"ok", "root", "stranger"}},
		"7":       {GID: new(int64(1))},
	})
	require.Truef(t, errdefs.IsInvalidArgument(err), "%v", err)
	for name, why := range bad {
		assert.ErrorContains(t, err, fmt.Sprintf("users has the user %q: %s", name, why))
	}
	for i, id := range ids {
		assert.ErrorContains(t, err, fmt.Sprintf(`users has "user%d" = %q: want`, i, id))
	}
	for _, text := range []string{
		"groups.nogid has no gid", "groups.neg has gid = -1", "groups.big has gid = 2147483648",
		`groups.members has the member "stranger"`, `groups has the group "7"`,
	} {
		assert.ErrorContains(t, err, text)
	}
	assert.NotContains(t, err.Error(), `member "root"`)
	assert.NotContains(t, err.Error(), `member "ok"`)
}
