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

package volume

import (
	"encoding/base64"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var update = flag.Bool("update", false, "write the golden files anew")

// The golden files are what was accepted by Kata's shims. A change of one is a
// change of the contract with them.
func TestOptionGolden(t *testing.T) {
	for name, v := range map[string]Volume{
		"empty-metadata": GuestPull("overlay", nil),
		"chain-id": GuestPull("sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", map[string]string{
			MetadataChainID:                        "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
			"containerd.io/snapshot/cri.image-ref": "registry.example/team/app:v1",
		}),
		"manifest": GuestPull("sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", map[string]string{
			MetadataChainID:        "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
			MetadataManifestDigest: "sha256:5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03",
			MetadataLayersSize:     "123456789012",
		}),
		"escapes": GuestPull("<source> & \"more\"", map[string]string{"k,1": "v\n=:\\,\u2028 é"}),
	} {
		t.Run(name, func(t *testing.T) {
			option, err := v.Option()
			require.NoError(t, err)
			golden := filepath.Join("testdata", name+".golden")
			if *update {
				require.NoError(t, os.WriteFile(golden, []byte(option+"\n"), 0o644))
			}
			want, err := os.ReadFile(golden)
			require.NoError(t, err)
			assert.Equal(t, strings.TrimSuffix(string(want), "\n"), option)
			assert.NotContains(t, option, ",", "an option in a list of options")

			decoded, err := ParseOption(option)
			require.NoError(t, err)
			assert.Equal(t, v, decoded)
		})
	}
}

// Kata's readers look for these keys; a renamed Go field must not rename them.
func TestJSONKeys(t *testing.T) {
	option, err := GuestPull("source", nil).Option()
	require.NoError(t, err)
	b, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(option, "io.katacontainers.volume="))
	require.NoError(t, err)
	var m map[string]any
	require.NoError(t, json.Unmarshal(b, &m))
	assert.Equal(t, map[string]any{
		"volume_type": "image_guest_pull",
		"source":      "source",
		"fs_type":     "overlay",
		"image_pull":  map[string]any{"metadata": map[string]any{}},
	}, m)
}

func TestOptionRefuses(t *testing.T) {
	for name, v := range map[string]Volume{
		"no type":     {Source: "s", ImagePull: &ImagePull{Metadata: map[string]string{}}},
		"other type":  {VolumeType: "direct_block", Source: "s", ImagePull: &ImagePull{Metadata: map[string]string{}}},
		"no source":   GuestPull("", nil),
		"no pull":     {VolumeType: TypeImageGuestPull, Source: "s"},
		"no metadata": {VolumeType: TypeImageGuestPull, Source: "s", ImagePull: &ImagePull{}},
	} {
		t.Run(name, func(t *testing.T) {
			option, err := v.Option()
			assert.ErrorIs(t, err, ErrInvalid)
			assert.Empty(t, option)
		})
	}
}

func TestParseOption(t *testing.T) {
	encode := func(s string) string { return OptionPrefix + base64.StdEncoding.EncodeToString([]byte(s)) }
	const good = `{"volume_type":"image_guest_pull","source":"s","fs_type":"overlay","image_pull":{"metadata":{}}}`

	for name, option := range map[string]string{
		"plain":         encode(good),
		"unknown field": encode(`{"future":1,` + good[1:]),
	} {
		t.Run(name, func(t *testing.T) {
			v, err := ParseOption(option)
			require.NoError(t, err)
			assert.Equal(t, GuestPull("s", nil), v)
		})
	}

	for name, option := range map[string]string{
		"empty":             "",
		"other option":      "lowerdir=/a",
		"no base64":         OptionPrefix + "{}",
		"unpadded":          OptionPrefix + base64.RawStdEncoding.EncodeToString([]byte(good+" ")),
		"url alphabet":      OptionPrefix + base64.URLEncoding.EncodeToString([]byte(strings.Replace(good, `"s"`, `"~~~???"`, 1))),
		"line break":        encode(good)[:60] + "\n" + encode(good)[60:],
		"no JSON":           encode("volume"),
		"two values":        encode(good + good),
		"other type":        encode(strings.Replace(good, "image_guest_pull", "direct_block", 1)),
		"no source":         encode(strings.Replace(good, `"s"`, `""`, 1)),
		"image_pull empty":  encode(strings.Replace(good, `{"metadata":{}}`, `{}`, 1)),
		"image_pull null":   encode(strings.Replace(good, `{"metadata":{}}`, `null`, 1)),
		"metadata null":     encode(strings.Replace(good, `{}`, `null`, 1)),
		"metadata no map":   encode(strings.Replace(good, `{}`, `[]`, 1)),
		"metadata no words": encode(strings.Replace(good, `{}`, `{"a":1}`, 1)),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseOption(option)
			assert.ErrorIs(t, err, ErrInvalid)
		})
	}
}

// Options are attacker-controlled where a guest reads them: decoding must not
// panic, and whatever decodes must encode to something that decodes to the same.
func FuzzParseOption(f *testing.F) {
	for _, name := range []string{"empty-metadata", "chain-id", "escapes"} {
		b, err := os.ReadFile(filepath.Join("testdata", name+".golden"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(strings.TrimSuffix(string(b), "\n"))
	}
	f.Add(OptionPrefix + "bnVsbA==")
	f.Fuzz(func(t *testing.T, option string) {
		v, err := ParseOption(option)
		if err != nil {
			assert.ErrorIs(t, err, ErrInvalid)
			return
		}
		again, err := v.Option()
		require.NoError(t, err)
		w, err := ParseOption(again)
		require.NoError(t, err)
		assert.Equal(t, v, w)
	})
}
