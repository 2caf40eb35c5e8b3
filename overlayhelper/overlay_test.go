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
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestSplitLowerdir(t *testing.T) {
	for value, want := range map[string][]layer{
		"/a":           {{path: "/a"}},
		"/a:/b":        {{path: "/a"}, {path: "/b"}},
		`/a\:b:/c`:     {{path: "/a:b"}, {path: "/c"}},
		`/a\\:/c`:      {{path: `/a\`}, {path: "/c"}},
		`/a\,b`:        {{path: "/a,b"}},
		`\/a`:          {{path: "/a"}},
		"a b:c":        {{path: "a b"}, {path: "c"}},
		"/a:/b::/c":    {{path: "/a"}, {path: "/b"}, {path: "/c", data: true}},
		"/a::/b::/c":   {{path: "/a"}, {path: "/b", data: true}, {path: "/c", data: true}},
		`/a\:\:b::/\:`: {{path: "/a::b"}, {path: "/:", data: true}},
	} {
		got, err := splitLowerdir(value)
		require.NoError(t, err, value)
		assert.Equal(t, want, got, value)
	}
}

func TestData(t *testing.T) {
	ov := overlay{
		lower: []layer{{path: `/l:1,2\3`}, {path: "/l 2"}, {path: "/d", data: true}},
		upper: "/u,1", work: "/w:1",
		other: []option{{"index", "on", true}, {"userxattr", "", false}, {"context", `"a:b,c"`, true}, {"empty", "", true}},
	}
	assert.Equal(t, `lowerdir=/l\:1\,2\\3:/l 2::/d,upperdir=/u\,1,workdir=/w\:1,index=on,userxattr,context="a:b,c",empty=`, ov.data())
}

// fsconfig(2) takes a layer as it is, but unescapes upperdir and workdir, and
// wants a context without its quotes.
func TestParameters(t *testing.T) {
	ov := overlay{
		source: "overlay",
		lower:  []layer{{path: `/l:1,2\3`}, {path: "/d", data: true}},
		upper:  `/u\1`, work: "/w",
		other: []option{{"userxattr", "", false}, {"context", `"a:b,c"`, true}},
	}
	assert.Equal(t, []option{
		{"source", "overlay", true},
		{"lowerdir+", `/l:1,2\3`, true},
		{"datadir+", "/d", true},
		{"upperdir", `/u\\1`, true},
		{"workdir", "/w", true},
		{"userxattr", "", false},
		{"context", "a:b,c", true},
	}, ov.parameters())

	assert.True(t, ov.fitsContext())
	ov.lower[0].path = "/" + strings.Repeat("l", maxParameter-1)
	assert.True(t, ov.fitsContext())
	ov.lower[0].path += "l"
	assert.False(t, ov.fitsContext())
}

func TestAbsolute(t *testing.T) {
	ov := overlay{target: "t", lower: []layer{{path: "l/../x"}, {path: "/abs"}}, upper: "u"}
	assert.False(t, ov.isAbsolute())
	got := ov.absolute("/cwd")
	assert.Equal(t, &overlay{target: "/cwd/t", lower: []layer{{path: "/cwd/l/../x"}, {path: "/abs"}}, upper: "/cwd/u"}, got)
	assert.True(t, got.isAbsolute())
	assert.Equal(t, "l/../x", ov.lower[0].path, "the original is as it was")
	assert.Equal(t, "/t", ov.absolute("/").target)
}

func TestShortened(t *testing.T) {
	for _, tc := range []struct {
		name        string
		lower       []string
		upper, work string

		dir            string
		rel            []string
		relUp, relWork string
	}{
		{
			name:  "snapshots",
			lower: []string{"/r/snapshots/2/fs", "/r/snapshots/1/fs"}, upper: "/r/snapshots/3/fs", work: "/r/snapshots/3/work",
			dir: "/r/snapshots/", rel: []string{"2/fs", "1/fs"}, relUp: "3/fs", relWork: "3/work",
		},
		{
			name:  "a directory in common, not a prefix of names",
			lower: []string{"/r/snap1/fs", "/r/snap12/fs"}, upper: "/r/s/u", work: "/other/w",
			dir: "/r/", rel: []string{"snap1/fs", "snap12/fs"}, relUp: "s/u", relWork: "/other/w",
		},
		{name: "one layer keeps a name", lower: []string{"/r/a"}, dir: "/r/", rel: []string{"a"}},
		{name: "a layer in the other", lower: []string{"/r/a/b", "/r/a"}, dir: "/r/", rel: []string{"a/b", "a"}},
		{name: "nothing in common", lower: []string{"/a", "/b"}, dir: "/", rel: []string{"a", "b"}},
		{name: "the root", lower: []string{"/", "/b"}, dir: "/", rel: []string{".", "b"}},
		{name: "slashes too many", lower: []string{"/r//a/", "/r//b"}, dir: "/r//", rel: []string{"a/", "b"}},
		{name: "slashes too many in one", lower: []string{"/r//a", "/r/b"}, dir: "/r/", rel: []string{"a", "b"}},
		{name: "dots are left alone", lower: []string{"/r/x/../a", "/r/x/b"}, dir: "/r/x/", rel: []string{"../a", "b"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ov := overlay{upper: tc.upper, work: tc.work}
			for _, p := range tc.lower {
				ov.lower = append(ov.lower, layer{path: p})
			}
			got := ov.shortened()
			assert.Equal(t, tc.dir, got.dir)
			var rel []string
			for _, l := range got.lower {
				rel = append(rel, l.path)
			}
			assert.Equal(t, tc.rel, rel)
			assert.Equal(t, tc.relUp, got.upper)
			assert.Equal(t, tc.relWork, got.work)
			assert.Equal(t, tc.lower[0], ov.lower[0].path, "the original is as it was")
		})
	}

	// The worst that overlayfs takes, in containerd's directories, fits a page.
	ov := overlay{upper: "/" + strings.Repeat("r", 200) + "/snapshots/500/fs", work: "/" + strings.Repeat("r", 200) + "/snapshots/500/work"}
	for i := range 400 {
		ov.lower = append(ov.lower, layer{path: "/" + strings.Repeat("r", 200) + "/snapshots/" + strconv.Itoa(i) + "/fs"})
	}
	assert.Less(t, len(ov.shortened().data()), 4096)
}

// What the kernel reads is what was given, whatever the bytes: escapes are
// undone and made again between the command line and the kernel. And nothing
// that is not for the kernel reaches it.
func FuzzOptions(f *testing.F) {
	for _, seed := range []string{
		"lowerdir=/a:/b",
		`lowerdir=/a\:b\,c\\d:/e::/f,upperdir=/u\,,workdir=/w,dev,suid`,
		"workdir=/r/3/work,upperdir=/r/3/fs,lowerdir=/r/1/fs," + volumeOption + "=" + secret,
		`context="a,b",lowerdir=x,ro,noatime,user=me,_netdev,x-a=b`,
		"lowerdir=a b\nc:$(d)`e`,,index=on",
		`lowerdir=/a\`,
		"lowerdir=:::",
		"lowerdir=/a,remount",
		"context=\"",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, list string) {
		texts, err := splitOptions(list)
		if err != nil {
			return
		}
		again, err := splitOptions(strings.Join(texts, ","))
		require.NoError(t, err)
		require.Equal(t, texts, again)

		ov, err := parseOptions([]string{list})
		if err != nil {
			require.NotContains(t, err.Error(), "\n")
			return
		}
		for _, opt := range ov.other {
			require.NotEqual(t, volumeOption, opt.key)
			_, ok := applyGeneric(0, opt.key, opt.hasValue)
			require.False(t, ok, opt.key)
		}
		// The flags apart, an overlay written out and read again is itself.
		back, err := parseOptions([]string{ov.data()})
		require.NoError(t, err)
		want := *ov
		want.flags = 0
		require.Equal(t, &want, back)

		ov.target = "mnt"
		abs := ov.absolute("/cwd")
		require.True(t, abs.isAbsolute())
		short := abs.shortened()
		require.True(t, strings.HasPrefix(short.dir, "/") && strings.HasSuffix(short.dir, "/"))
		for i, l := range short.lower {
			require.False(t, strings.HasPrefix(l.path, "/"), "every layer is below the common directory")
			require.NotEmpty(t, l.path)
			// Slashes apart, directory and rest are the path. Dots are the
			// kernel's to resolve.
			require.Equal(t, slashes(abs.lower[i].path), slashes(short.dir+l.path))
		}
	})
}

// slashes removes slashes that mean nothing.
func slashes(p string) string {
	for strings.Contains(p, "//") {
		p = strings.ReplaceAll(p, "//", "/")
	}
	return strings.TrimSuffix(strings.TrimSuffix(p, "/"), "/.")
}
