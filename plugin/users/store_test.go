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
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"
)

// The store is a cache: a damaged one is no reason not to start.
func TestStore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "users.db")
	big := bytes.Repeat([]byte("x"), 3<<20)
	all := map[string]Files{
		"sha256:1": {Passwd: []byte("P"), Group: []byte("G")},
		"sha256:2": {Passwd: []byte{}},
		"sha256:3": {Group: big},
		"sha256:4": {},
	}
	s, err := openStore(t.Context(), path)
	require.NoError(t, err)
	for chain, files := range all {
		require.NoError(t, s.put(chain, Files{Passwd: []byte("old"), Group: []byte("old")}))
		require.NoError(t, s.put(chain, files))
	}
	for range 2 {
		for chain, want := range all {
			got, known, err := s.get(chain)
			require.NoError(t, err)
			require.True(t, known)
			require.Equal(t, want, got, chain)
		}
		require.NoError(t, s.close())
		s, err = openStore(t.Context(), path)
		require.NoError(t, err)
	}
	_, known, err := s.get("sha256:5")
	require.NoError(t, err)
	require.False(t, known)
	require.NoError(t, s.remove("sha256:5"))
	require.NoError(t, s.remove("sha256:1"))
	chains, err := s.chains()
	require.NoError(t, err)
	require.Equal(t, []string{"sha256:2", "sha256:3", "sha256:4"}, chains)
	require.NoError(t, s.close())

	intact, err := os.ReadFile(path)
	require.NoError(t, err)
	for name, damaged := range map[string][]byte{
		"cut off":     intact[:bytes.Index(intact, big)+len(big)/2],
		"first pages": intact[:12<<10],
		"text":        []byte(strings.Repeat("text\n", 10000)),
		"garbage":     append(bytes.Clone(intact[:8192]), bytes.Repeat([]byte{0x5a}, len(intact)-8192)...),
	} {
		t.Run(name, func(t *testing.T) {
			require.NoError(t, os.WriteFile(path, damaged, 0o600))
			s, err := openStore(t.Context(), path)
			require.NoError(t, err)
			defer s.close()
			chains, err := s.chains()
			require.NoError(t, err)
			require.Empty(t, chains)
			require.NoError(t, s.put("sha256:1", all["sha256:1"]))
			require.NoError(t, s.close())
		})
	}

	db, err := bolt.Open(path, 0o600, nil)
	require.NoError(t, err)
	defer db.Close()
	before, err := os.Stat(path)
	require.NoError(t, err)
	_, err = openStore(t.Context(), path)
	require.ErrorContains(t, err, path, "a store that is in use is not a damaged one")
	after, err := os.Stat(path)
	require.NoError(t, err)
	require.True(t, os.SameFile(before, after))
}
