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
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestLoadConfig(t *testing.T) {
	c, err := LoadConfig("")
	require.NoError(t, err)
	assert.Equal(t, Config{Flavour: FlavourGo, PullTimeout: Duration(5 * time.Minute)}, c)

	path := filepath.Join(t.TempDir(), "guest.json")
	write := func(s string) { require.NoError(t, os.WriteFile(path, []byte(s), 0o600)) }

	write(`{"flavour":"rust","record_dir":"/r","runc_root":"/runc","pull_timeout":"1m30s","ca_file":"/ca","ignore_chain_id":true,"systemd_cgroup":true,
		"registries":{"localhost:5000":{"username":"u","password":"p","plain_http":true}}}`)
	c, err = LoadConfig(path)
	require.NoError(t, err)
	assert.Equal(t, Config{
		Flavour:       FlavourRust,
		RecordDir:     "/r",
		RuncRoot:      "/runc",
		PullTimeout:   Duration(90 * time.Second),
		CAFile:        "/ca",
		IgnoreChainID: true,
		SystemdCgroup: true,
		Registries:    map[string]Registry{"localhost:5000": {Username: "u", Password: "p", PlainHTTP: true}},
	}, c)

	for content, message := range map[string]string{
		``:                           "EOF",
		`{"flavor":"go"}`:            "flavor",
		`{"flavour":"python"}`:       `"python"`,
		`{"record_dir":"here"}`:      "absolute",
		`{"runc_root":"here"}`:       "runc_root",
		`{"pull_timeout":"soon"}`:    "soon",
		`{"pull_timeout":"-1s"}`:     "positive",
		`{"pull_timeout":3}`:         "pull_timeout",
		`{"flavour":"go"}{}`:         "more than one",
		`{"registries":{"a":"b:c"}}`: "registries",
	} {
		write(content)
		_, err := LoadConfig(path)
		require.ErrorContains(t, err, message, content)
		assert.ErrorIs(t, err, errdefs.ErrInvalidArgument, content)
		assert.ErrorContains(t, err, path, "the error has to name the file")
	}

	_, err = LoadConfig(path + ".missing")
	assert.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	assert.ErrorIs(t, err, os.ErrNotExist)
}
