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

package figures

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// What several tests add at once is summed, a zero is shown, and what was never
// counted is not.
func TestSums(t *testing.T) {
	path := filepath.Join(t.TempDir(), "figures")
	t.Setenv(Env, path)
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			for range 10 {
				assert.NoError(t, Add(Kills, 2))
			}
		})
	}
	all.Wait()
	require.NoError(t, Add(LayerBytes, 0))

	var out strings.Builder
	require.NoError(t, Print(&out, path))
	require.Equal(t, "     400  rounds of kill survived\n       0  layer bytes fetched by the host\n", out.String())

	require.NoError(t, os.WriteFile(path, []byte("many\tkills\n"), 0o600))
	require.Error(t, Print(&out, path))
	require.Error(t, Print(&out, filepath.Join(t.TempDir(), "none")))
}
